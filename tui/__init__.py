"""Chatting with a model in a terminal: a Textual app (`app`) and a line by line one without Textual (`plain`).

Importing this package imports neither; nothing in it imports onnxruntime.
"""
