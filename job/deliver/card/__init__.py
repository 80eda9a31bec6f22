"""The model card of an adapter, and of a merged model."""
