"""Explanations of features by a language model, and their scores as predictions of where a feature fires.

`protocol` builds the prompts and reads the answers, `endpoint` sends requests by HTTP, `answers` keeps the answers on disk, and
`interview` asks about many features.
"""
