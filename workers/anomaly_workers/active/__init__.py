"""Query strategies: which images a person should look at first."""
