"""What is cut: numbers of channels, the slots of each group, and the plan that says so."""
