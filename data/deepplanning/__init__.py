"""The travel tasks of DeepPlanning as an environment: tools that look things up, and a scorer that judges the plan.

travel.py answers a model's turns and scores its plan. Everything here is written from a description of the benchmark,
and README.md says where the description left a choice.
"""
