"""Plan runs and make them: from settings to records, one run or many at a time."""
