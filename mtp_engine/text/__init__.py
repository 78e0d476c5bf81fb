"""Tokens to text and back: tokenizer, chat templates, tool calls."""
