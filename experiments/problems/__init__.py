"""Problems: one folder each, with its data, model, tasks, configuration, baselines and published results."""
