"""Reading configurations: YAML, the parser, and one plain sentence for each mistake."""
