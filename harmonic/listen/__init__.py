"""A page that plays an endless stream while it is generated.

`session` is one listener's stream, `prompt` reads what it shall continue, `server` speaks with the page, and
`templates` holds the page.
"""
