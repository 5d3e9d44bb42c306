"""Crash-safe checkpoints: slices of global tensors in safetensors files, one JSON index, nothing ever unpickled.

sparse       slices of tables and tower modules; those of the dense side are in dense/masters.py
format       index.json and the headers of the files, checked before anything is allocated
writing      one rank's file; publish: from all ranks' files to a published checkpoint
reading      any slice out of the slices that were written
store        saves, loads and resumes a run
offline      inspect, verify, reshape and export without a run
"""
