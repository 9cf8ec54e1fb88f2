"""Contracts that every layer above relies on: networks, arguments, seeds, errors, progress."""
