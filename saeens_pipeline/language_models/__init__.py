"""Language models, hooks, tokens, corpora and labelled texts. Recipes and artefacts are in `storage` and `assets`."""
