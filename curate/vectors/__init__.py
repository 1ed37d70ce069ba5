"""Embeddings on disk: how they are kept, searched and clustered."""
