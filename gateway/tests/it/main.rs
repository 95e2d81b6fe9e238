//! Through the front door: a real gateway before scripted nodes and apps.

mod apps;
mod objects;
mod support;
