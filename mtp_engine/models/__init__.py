"""Main models and MTP layers."""
