"""All runs of a store in, what they say together out."""
