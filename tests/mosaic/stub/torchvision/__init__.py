"""Stands in for torchvision, of which reading shards needs nothing."""
