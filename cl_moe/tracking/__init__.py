"""MLflow runs, names, artifacts, figures and the comparison of arms. Importing it imports nothing."""
