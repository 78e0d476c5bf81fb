"""Requests, who runs when, and the decode loop that advances them."""
