"""Replies that follow a JSON Schema: the schema as a language of bytes, and the tokens that keep a text within it.

schema ─json_schema─▶ term ─terms─▶ what may follow each byte ─constraint─▶ tokens that may come next
"""
