"""Rows on disk become tokens with labels: read, check every row, render, mask what is not the assistant's."""
