"""A prompt with what is right for it and a model's answer in, a score with a reason out; Python answers run contained."""
