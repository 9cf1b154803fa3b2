"""What stands below the operators: the code of each backend, in one folder for all operators."""
