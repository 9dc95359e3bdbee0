"""Runs of image models: a run is a folder with a configuration, a log, weights and results.

| file | holds |
| --- | --- |
| configs | model, training and budget of a run |
| runs | what is in a run's folder, and how it is read |
| weights | the weights of a run, read without trusting its files |
| devices | where models are |
| training | how a run is trained and resumed |
| evaluation | test likelihood and diagnostics, streamed over draws |
| probe | linear classification from the latents |
| sweep | many runs, one table |
| report | tables and curves |
| pictures | what a run's model draws and reconstructs |
"""
