"""Files: configs, run directories, results, checkpoints, pictures."""
