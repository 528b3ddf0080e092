"""The report: pages that open from disk, without a server or a network.

`results` reads the tables, `figures` builds `charts` from them, `pictures` draws charts as PNG, `record` reads recipes, and `pages` writes
the folder of a report.
"""
