"""
The page of the demo, each file one job:

- `photos`: which photo a visitor means, and reading it safely.
- `looks`: what a model finds in a photo, computed by `cbsa_hf` and kept for a while.
- `drawing`: arrays to small pictures, colours and colour bars.
- `views`: a look as HTML, one function a part of the page.
- `page`: the components, and what happens when one changes.
- `endpoints`: the same looks as numbers, for programs and agents.
"""
