"""
`steer play`: a page to chat with a model and its steered self side by side.

- `compare`: answers of both, token by token; what the vectors change in each token's probability
- `views`: what `compare` returns, as HTML
- `page`: the Gradio page
- `demo`: the vectors of `steer play --demo`

All but `page` works without Gradio.
"""
