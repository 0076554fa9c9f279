//! From the user's enum to what it says, checked.

use std::collections::{HashMap, HashSet};

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{
    Attribute, Data, DeriveInput, Error, Field, Fields, Ident, LitInt, LitStr, Path, Result, Token,
};

/// Longest event type name in bytes, as the library has it.
const NAME_BYTES_MAX: usize = 255;

/// What the enum says.
pub(crate) struct Events {
    pub(crate) ident: Ident,
    /// Where the library is.
    pub(crate) library: Path,
    pub(crate) variants: Vec<Variant>,
    pub(crate) past: Vec<Past>,
}

/// A kind of events that are written.
pub(crate) struct Variant {
    pub(crate) ident: Ident,
    pub(crate) shape: Shape,
    pub(crate) kind: Kind,
    pub(crate) codec: Codec,
    /// The first version that was ever written.
    since: u32,
}

/// What a variant holds.
pub(crate) enum Shape {
    Nothing,
    /// One value, which is the payload.
    Value,
    Fields(Vec<Field>),
}

/// A kind of events that are only read.
pub(crate) struct Past {
    pub(crate) kind: Kind,
    pub(crate) upcaster: Path,
}

/// A name and a version, and where they stand.
pub(crate) struct Kind {
    pub(crate) name: String,
    pub(crate) version: u32,
    name_span: Span,
    version_span: Span,
}

#[derive(Clone, Copy)]
pub(crate) enum Codec {
    Bincode,
    Json,
}

/// One thing within `#[event(…)]`.
struct Item {
    key: Ident,
    value: Value,
}

enum Value {
    Name(LitStr),
    Version(LitInt, u32),
    Codec(Codec),
    Since(u32),
    Upcast { of: Option<LitStr>, steps: Vec<(LitInt, u32, Path)> },
    Library(Path),
}

impl Parse for Item {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let key = Ident::parse_any(input)?;
        if key == "upcast" {
            let within;
            syn::parenthesized!(within in input);
            return Ok(Self { key, value: upcast(&within)? });
        }
        input.parse::<Token![=]>()?;
        let value = match key.to_string().as_str() {
            "name" => Value::Name(name(input)?),
            "version" => {
                version(input).map(|(literal, version)| Value::Version(literal, version))?
            }
            "codec" => Value::Codec(codec(input)?),
            "since" => Value::Since(version(input)?.1),
            "crate" => Value::Library(input.parse()?),
            other => {
                let known = "name, version, codec, since, upcast";
                return Err(Error::new(key.span(), format!("no such thing as {other:?}: {known}")));
            }
        };
        Ok(Self { key, value })
    }
}

/// `1 = f, 2 = g`, perhaps with the name of another type in front.
fn upcast(input: ParseStream<'_>) -> Result<Value> {
    let of = input.peek(LitStr).then(|| name(input)).transpose()?;
    if of.is_some() && !input.is_empty() {
        input.parse::<Token![,]>()?;
    }
    let mut steps = Vec::new();
    while !input.is_empty() {
        let (literal, version) = version(input)?;
        input.parse::<Token![=]>()?;
        let upcaster = input
            .call(Path::parse_mod_style)
            .map_err(|error| Error::new(error.span(), "expected the path of a function"))?;
        steps.push((literal, version, upcaster));
        if !input.is_empty() {
            input.parse::<Token![,]>()?;
        }
    }
    if steps.is_empty() {
        return Err(input.error("expected what becomes of each old version, as in `1 = function`"));
    }
    Ok(Value::Upcast { of, steps })
}

fn name(input: ParseStream<'_>) -> Result<LitStr> {
    let literal: LitStr = input.parse()?;
    let name = literal.value();
    let wrong = if name.is_empty() {
        Some("the name is empty")
    } else if name.len() > NAME_BYTES_MAX {
        Some("the name is longer than 255 bytes")
    } else if name.chars().any(char::is_control) {
        Some("the name contains a control character")
    } else if name.starts_with('$') {
        Some("names beginning with '$' are reserved")
    } else {
        None
    };
    wrong.map_or(Ok(()), |wrong| Err(Error::new(literal.span(), wrong)))?;
    Ok(literal)
}

fn version(input: ParseStream<'_>) -> Result<(LitInt, u32)> {
    let literal: LitInt = input.parse()?;
    match literal.base10_parse() {
        Ok(0) => Err(Error::new(literal.span(), "versions begin with 1")),
        parsed => Ok((literal.clone(), parsed?)),
    }
}

fn codec(input: ParseStream<'_>) -> Result<Codec> {
    let codec = Ident::parse_any(input)?;
    match codec.to_string().as_str() {
        "bincode" => Ok(Codec::Bincode),
        "json" => Ok(Codec::Json),
        _ => Err(Error::new(codec.span(), "expected `bincode` or `json`")),
    }
}

/// All items of the `#[event(…)]`s; each key but `upcast` at most once.
fn items(attributes: &[Attribute]) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = Vec::new();
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("event")) {
        let parser = Punctuated::<Item, Token![,]>::parse_terminated;
        for item in attribute.parse_args_with(parser)? {
            if item.key != "upcast" && items.iter().any(|other| other.key == item.key) {
                let key = &item.key;
                return Err(Error::new(key.span(), format!("`{key}` is there twice")));
            }
            items.push(item);
        }
    }
    Ok(items)
}

/// Reads the enum.
pub(crate) fn events(input: &DeriveInput) -> Result<Events> {
    let Data::Enum(data) = &input.data else {
        let message = "events are the variants of an enum, with one variant for each type of event";
        return Err(Error::new(input.ident.span(), message));
    };
    if !input.generics.params.is_empty() {
        let message = "a type of events has no generic parameters: what is stored has one form";
        return Err(Error::new(input.generics.params.span(), message));
    }
    if data.variants.is_empty() {
        return Err(Error::new(input.ident.span(), "there is no event: add a variant"));
    }
    let mut events = Events {
        ident: input.ident.clone(),
        library: syn::parse_quote!(::headwater),
        variants: Vec::new(),
        past: Vec::new(),
    };
    let mut codec = Codec::Bincode;
    for Item { key, value } in items(&input.attrs)? {
        match value {
            Value::Codec(of_all) => codec = of_all,
            Value::Library(path) => events.library = path,
            Value::Upcast { of: Some(of), steps } => events.past.extend(past(&of, steps)),
            Value::Upcast { of: None, .. } => {
                let message = "say of which type, as in `upcast(\"order.placed\", 1 = function)`";
                return Err(Error::new(key.span(), message));
            }
            _ => return Err(Error::new(key.span(), format!("`{key}` belongs to a variant"))),
        }
    }
    let mut errors = None;
    for variant in &data.variants {
        match read_variant(variant, codec, &mut events.past) {
            Ok(variant) => events.variants.push(variant),
            Err(error) => add(&mut errors, error),
        }
    }
    if errors.is_none() {
        check(&events, &mut errors);
    }
    errors.map_or(Ok(events), Err)
}

fn add(errors: &mut Option<Error>, error: Error) {
    match errors {
        Some(errors) => errors.combine(error),
        None => *errors = Some(error),
    }
}

fn past(of: &LitStr, steps: Vec<(LitInt, u32, Path)>) -> impl Iterator<Item = Past> + use<> {
    let (name, name_span) = (of.value(), of.span());
    steps.into_iter().map(move |(literal, version, upcaster)| Past {
        kind: Kind { name: name.clone(), version, name_span, version_span: literal.span() },
        upcaster,
    })
}

fn read_variant(
    variant: &syn::Variant,
    mut codec: Codec,
    all_past: &mut Vec<Past>,
) -> Result<Variant> {
    let (mut name, mut version, mut since) = (None, None, 1);
    let mut upcasts = Vec::new();
    for Item { key, value } in items(&variant.attrs)? {
        match value {
            Value::Name(literal) => name = Some(literal),
            Value::Version(literal, number) => version = Some((literal, number)),
            Value::Codec(own) => codec = own,
            Value::Since(number) => since = number,
            Value::Upcast { of, steps } => upcasts.push((of, steps)),
            Value::Library(_) => {
                return Err(Error::new(key.span(), "`crate` belongs to the enum"));
            }
        }
    }
    let (Some(name), Some((literal, version))) = (name, version) else {
        let message = "say under which name and version it is stored, as in \
                       `#[event(name = \"order.placed\", version = 1)]`";
        return Err(Error::new(variant.ident.span(), message));
    };
    for (of, steps) in upcasts {
        all_past.extend(past(of.as_ref().unwrap_or(&name), steps));
    }
    let kind =
        Kind { name: name.value(), version, name_span: name.span(), version_span: literal.span() };
    Ok(Variant { ident: variant.ident.clone(), shape: shape(variant)?, kind, codec, since })
}

fn shape(variant: &syn::Variant) -> Result<Shape> {
    let fields = match &variant.fields {
        fields if fields.is_empty() => return Ok(Shape::Nothing),
        Fields::Unnamed(fields) if fields.unnamed.len() == 1 => return Ok(Shape::Value),
        Fields::Unnamed(fields) => {
            let message = "expected one field, which is the payload; or name the fields";
            return Err(Error::new(fields.span(), message));
        }
        fields => fields,
    };
    for field in fields {
        if let Some(serde) = field.attrs.iter().find(|it| it.path().is_ident("serde")) {
            let message = "give the fields a struct of their own to tell serde about them";
            return Err(Error::new(serde.span(), message));
        }
    }
    Ok(Shape::Fields(fields.iter().cloned().collect()))
}

/// What the invariants in the crate's documentation say.
fn check(events: &Events, errors: &mut Option<Error>) {
    let mut kinds = HashSet::new();
    let mut newest: HashMap<&str, u32> = HashMap::new();
    for Variant { kind, .. } in &events.variants {
        if !kinds.insert((kind.name.as_str(), kind.version)) {
            let Kind { name, version, name_span, .. } = kind;
            let message = format!("{name:?} is there twice in version {version}");
            add(errors, Error::new(*name_span, message));
        }
        let newest = newest.entry(&kind.name).or_default();
        *newest = kind.version.max(*newest);
    }
    for Past { kind: Kind { name, version, version_span, .. }, .. } in &events.past {
        let present = newest.get(name.as_str());
        if present.is_some_and(|present| version > present) {
            let message = format!("version {version} of {name:?} is newer than what is written");
            add(errors, Error::new(*version_span, message));
        } else if !kinds.insert((name, *version)) {
            let message = format!("what reads version {version} of {name:?} is there twice");
            add(errors, Error::new(*version_span, message));
        }
    }
    for (name, newest) in newest {
        check_none_is_missing(events, &kinds, name, newest, errors);
    }
}

fn check_none_is_missing(
    events: &Events,
    kinds: &HashSet<(&str, u32)>,
    name: &str,
    newest: u32,
    errors: &mut Option<Error>,
) {
    let variants = || events.variants.iter().filter(|variant| variant.kind.name == name);
    let since = variants().map(|variant| variant.since).max().unwrap_or(1);
    let missing = (since..newest).find(|version| !kinds.contains(&(name, *version)));
    let newest = variants().find(|variant| variant.kind.version == newest);
    if let (Some(missing), Some(Variant { kind, .. })) = (missing, newest) {
        let message = format!(
            "nothing reads version {missing} of {name:?}: say what becomes of it, as in \
             `upcast({missing} = function)`, or where versions begin, as in `since = {}`, if it was \
             never stored",
            missing + 1,
        );
        add(errors, Error::new(kind.version_span, message));
    }
}
