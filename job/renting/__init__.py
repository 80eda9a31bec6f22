"""`python -m job submit`: a run's settings in, a RunPod pod that does the run out, followed to its end."""
