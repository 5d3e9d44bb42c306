"""Crash-safe checkpoints: slices of global tensors in safetensors files, one JSON index, nothing ever unpickled.

pieces       slices of global tensors, as live tensors of a rank
dense        those of the DeepSpeed engine, at any stage; sparse: those of tables and tower modules
format       index.json and the headers of the files, checked before anything is allocated
writing      one rank's file; publish: from all ranks' files to a published checkpoint
reading      any slice out of the slices that were written
store        saves, loads and resumes a run
offline      inspect, verify, reshape and export without a run
"""
