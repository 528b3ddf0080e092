"""Work behind the rows of tables: modules that load torch, imported when rows are computed."""
