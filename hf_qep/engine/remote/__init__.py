"""Weight files of a Hub model that come while they are needed, and may go afterwards.

`shards` is what a job asks for, `cache` brings files into the Hub cache, compares and removes them, `files` has the
requests, and `errors` the words for what goes wrong with them.
"""
