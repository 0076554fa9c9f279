//! `#[derive(Event)]` of `headwater`. Use it through that crate, which describes it.
//!
//! ```text
//! enum with #[event(…)] ──read──▶ Events ──check──▶ Events ──write──▶ impl Event
//! ```
//!
//! Invariants, all checked while the user's code is compiled:
//! - No two variants, and no variant and upcaster, have the same name and version.
//! - Every version in front of the newest of a type is read: by a variant, or by an upcaster. Raising a
//!   version without saying what becomes of the old one does not compile.

mod read;
#[cfg(test)]
mod tests;
mod write;

use proc_macro2::TokenStream;

/// See the documentation of `headwater`.
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    expand(input.into()).unwrap_or_else(|error| error.to_compile_error()).into()
}

fn expand(input: TokenStream) -> syn::Result<TokenStream> {
    Ok(write::implementation(&read::events(&syn::parse2(input)?)?))
}
