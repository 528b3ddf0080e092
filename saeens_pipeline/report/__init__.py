"""The report: what an experiment found, as pages that open from disk, without a server or a network.

`results` reads the tables, `words`, `figures` and `pictures` say and draw what is in them, `record` tells what was run and where each
number comes from, and `pages` writes it all into one folder.
"""
