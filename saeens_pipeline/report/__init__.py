"""The report: pages that open from disk, without a server or a network.

`results` reads the tables, `figures` makes `charts` of them, `pictures` draws charts as PNG, `record` reads recipes, and `pages` writes all
of it into one folder.
"""
