"""Workers, detectors and the Label Studio dialect of label-studio-anomaly."""
