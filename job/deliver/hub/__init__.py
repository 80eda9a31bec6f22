"""A folder in, one commit on the Hub out."""
