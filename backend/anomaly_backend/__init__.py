"""The front end of label-studio-anomaly: answers Label Studio at once, never loads torch."""
