"""Text to read: suites, documents, the Pile's subsets, tasks. Evaluation and calibration both start here."""
