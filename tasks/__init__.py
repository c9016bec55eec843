"""Stream builders: one file builds one stream; a builder's parameters are the keys of its YAML."""
