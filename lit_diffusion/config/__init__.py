"""Configurations as they are read: YAML, the parser, and one plain sentence for each mistake."""
