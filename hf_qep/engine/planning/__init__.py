"""What a job will take and give, from a configuration alone: files, memory, disk, time, and what decoding needs.

`origin` reads the configuration, `sketch` finds out what the model is made of, `output`, `memory`, `costs` and
`decoding` are one subject each, `job` puts them together and `limits` says what fits and what would.
"""
