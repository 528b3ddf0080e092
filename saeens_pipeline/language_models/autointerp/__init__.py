"""Explanations of features by a language model, and how well they tell where a feature fires. Imports no Dagster.

`protocol` says what is asked and what an answer means, `endpoint` asks by HTTP, `answers` keeps on disk what was answered, and
`interview` goes through the features.
"""
