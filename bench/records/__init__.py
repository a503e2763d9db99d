"""Records of runs and of speed measurements: schema, storage and provenance."""
