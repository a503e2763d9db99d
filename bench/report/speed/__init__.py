"""Tables, goals and the figure of the speed benchmark, from its records."""
