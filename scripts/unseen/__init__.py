"""Better recognition of objects never seen: characters of alphabets that no student has met."""
