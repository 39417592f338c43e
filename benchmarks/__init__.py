"""What the package costs: one script for each question, run from the repository's root. README.md says how."""
