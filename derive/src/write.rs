//! From what the enum says to the implementation.

use std::collections::BTreeMap;

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Field, Ident, LitStr, Path};

use crate::read::{Codec, Events, Past, Shape, Variant};

pub(crate) fn implementation(events: &Events) -> TokenStream {
    let (ident, library) = (&events.ident, &events.library);
    let kinds = kinds(events);
    let kind = events.variants.iter().map(|variant| {
        let Variant { ident, kind, .. } = variant;
        let (name, version) = (&kind.name, kind.version);
        quote!(Self::#ident { .. } => #library::EventKind { name: #name, schema_version: #version },)
    });
    let encode = events.variants.iter().map(|variant| encode_arm(variant, library));
    let step = step_arms(events);
    quote! {
        #[automatically_derived]
        impl #library::Event for #ident {
            const KINDS: &'static [#library::KnownKind] = &[#kinds];

            fn kind(&self) -> #library::EventKind {
                match self { #(#kind)* }
            }

            fn encode(&self) -> ::core::result::Result<
                (#library::PayloadCodec, ::std::vec::Vec<u8>),
                #library::codec::CodecError,
            > {
                match self { #(#encode)* }
            }

            #[inline]
            fn step(
                kind: #library::EventKindRef<'_>,
                payload: #library::Payload<'_>,
            ) -> ::core::result::Result<#library::upcast::Step<Self>, #library::codec::CodecError> {
                // Each name is compared once.
                ::core::result::Result::Ok(match kind.name {
                    #step
                    _ => #library::upcast::Step::Foreign,
                })
            }
        }
    }
}

fn kinds(events: &Events) -> TokenStream {
    let library = &events.library;
    let present = events.variants.iter().map(|Variant { kind, .. }| {
        let (name, version) = (&kind.name, kind.version);
        quote!(#library::KnownKind::present(#name, #version),)
    });
    let past = events.past.iter().map(|Past { kind, .. }| {
        let (name, version) = (&kind.name, kind.version);
        quote!(#library::KnownKind::past(#name, #version),)
    });
    quote!(#(#present)* #(#past)*)
}

fn encode_arm(variant: &Variant, library: &Path) -> TokenStream {
    let Variant { ident, shape, codec, .. } = variant;
    let codec = match codec {
        Codec::Bincode => quote!(Bincode),
        Codec::Json => quote!(Json),
    };
    let (pattern, prepare, value) = match shape {
        Shape::Nothing => (quote!({}), quote!(), quote!(&())),
        Shape::Value => (quote!((data)), quote!(), quote!(data)),
        Shape::Fields(fields) => {
            let names = names(fields);
            let types = fields.iter().map(|field| &field.ty);
            let (serde, shown) = (serde_path(library), ident.to_string());
            let prepare = quote! {
                #[derive(#library::__private::serde::Serialize)]
                #[serde(crate = #serde, rename = #shown)]
                struct __Fields<'a> { #(#names: &'a #types),* }
            };
            (quote!({ #(#names),* }), prepare, quote!(&__Fields { #(#names),* }))
        }
    };
    quote! {
        Self::#ident #pattern => {
            #prepare
            ::core::result::Result::Ok((
                <#library::codec::#codec as #library::codec::Codec>::KIND,
                <#library::codec::#codec as #library::codec::Codec>::encode(#value)?,
            ))
        }
    }
}

/// An arm for each name, and within it one for each version.
fn step_arms(events: &Events) -> TokenStream {
    let library = &events.library;
    let mut arms: BTreeMap<&str, Vec<TokenStream>> = BTreeMap::new();
    for variant in &events.variants {
        let version = variant.kind.version;
        let value = decode(variant, library);
        let arm = quote!(#version => #library::upcast::Step::Value({ #value }),);
        arms.entry(&variant.kind.name).or_default().push(arm);
    }
    for Past { kind, upcaster } in &events.past {
        let version = kind.version;
        let arm = quote!(#version => #library::upcast::Step::Upcast(#upcaster),);
        arms.entry(&kind.name).or_default().push(arm);
    }
    let arms = arms.into_iter().map(|(name, versions)| {
        quote! {
            #name => match kind.schema_version {
                #(#versions)*
                version => return ::core::result::Result::Err(
                    #library::codec::CodecError::SchemaVersion { name: #name, version },
                ),
            },
        }
    });
    quote!(#(#arms)*)
}

fn decode(variant: &Variant, library: &Path) -> TokenStream {
    let ident = &variant.ident;
    match &variant.shape {
        Shape::Nothing => quote!(payload.decode::<()>()?; Self::#ident {}),
        Shape::Value => quote!(Self::#ident(payload.decode()?)),
        Shape::Fields(fields) => {
            let names = names(fields);
            let types = fields.iter().map(|field| &field.ty);
            let (serde, shown) = (serde_path(library), ident.to_string());
            quote! {
                #[derive(#library::__private::serde::Deserialize)]
                #[serde(crate = #serde, rename = #shown)]
                struct __Fields { #(#names: #types),* }
                let __Fields { #(#names),* } = payload.decode()?;
                Self::#ident { #(#names),* }
            }
        }
    }
}

fn names(fields: &[Field]) -> Vec<&Ident> {
    fields.iter().filter_map(|field| field.ident.as_ref()).collect()
}

/// Where serde is, as serde's own derive wants to be told.
fn serde_path(library: &Path) -> LitStr {
    let path = quote!(#library::__private::serde).to_string().replace(' ', "");
    LitStr::new(&path, proc_macro2::Span::call_site())
}
