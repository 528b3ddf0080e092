"""The builders: what artefacts there are, what they are made from, and how."""
