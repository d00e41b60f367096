"""The earlier NumPy system's problem: 16 tokens x 8 experts, random untrained experts.

Command:   python -m experiments.seed_problem
Hardware:  two CPU cores
Time:      under 90 seconds
Expected:  its genetic algorithm about -0.35, as it claims; DiscreteGA -0.335 or higher; predicting zero -0.64 in error
           alone, better than any of them
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.problem_seed = 0
    config.held_out_seed = 1000  # fresh data for the same weights
    config.seeds = 3

    config.original = ConfigDict()
    config.original.population_size = 20
    config.original.generations = 20

    config.evolution = ConfigDict()
    config.evolution.population_size = 256
    config.evolution.generations = 300
    config.evolution.chunk = 100
    config.evolution.crossover_rate = 0.9
    config.evolution.edits = 2.0

    config.timing = ConfigDict()
    config.timing.numpy_generations = 20
    config.timing.repeats = 5
    return config
