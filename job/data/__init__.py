"""Rows in, labelled tokens out, and a counted reason for every row that is dropped."""
