"""The OpenAPI document: paths from the route table, options from their declarations, bodies and answers from here.

document    the whole document
images      image routes
openai      routes for OpenAI clients
jobs        job routes
purposes    groups of routes, and a description of each
parts       the pieces that they are made of
"""
