//! Which mechanism is offered first.

use crate::{Connection, Element, Error, Next, RequestCall};

/// Sorts a request's preferences by a list of mechanism types; types that are not listed come last. The order of
/// preferences of one type stays.
#[derive(Clone, Debug, Default)]
pub struct MechanismPriority(Vec<String>);

impl MechanismPriority {
    /// The first type of the list is offered first.
    pub fn new(types: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self(types.into_iter().map(Into::into).collect())
    }
}

#[async_trait::async_trait]
impl Element for MechanismPriority {
    fn name(&self) -> &'static str {
        "mechanismpriority"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let rank = |kind: &str| self.0.iter().position(|listed| listed == kind).unwrap_or(self.0.len());
        call.message.mechanism_preferences.sort_by_key(|preference| rank(&preference.r#type));
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context, Mechanism,
        core::testing::{Spy, request_id},
    };
    use std::sync::Arc;

    // Conformance 89
    #[tokio::test]
    async fn listed_types_first_in_the_order_of_the_list() {
        for (list, expected) in [
            (&["VXLAN", "KERNEL"][..], ["VXLAN/1", "KERNEL/1", "KERNEL/2", "MEMIF/1", "WIREGUARD/1"]),
            (&["NOOP"], ["MEMIF/1", "KERNEL/1", "VXLAN/1", "WIREGUARD/1", "KERNEL/2"]),
            (&[], ["MEMIF/1", "KERNEL/1", "VXLAN/1", "WIREGUARD/1", "KERNEL/2"]),
        ] {
            let spy = Arc::new(Spy::default());
            let mut call = request_id("c", Context::new());
            let offer =
                |(kind, cls): (&str, &str)| Mechanism { r#type: kind.into(), cls: cls.into(), ..Default::default() };
            let offers = [("MEMIF", "1"), ("KERNEL", "1"), ("VXLAN", "1"), ("WIREGUARD", "1"), ("KERNEL", "2")];
            call.message.mechanism_preferences = offers.map(offer).into();
            let priority = MechanismPriority::new(list.iter().copied());
            Chain::builder().element(priority).element(spy.clone()).build().request(call).await.unwrap();
            let sorted = spy.last_request().mechanism_preferences;
            let sorted: Vec<_> = sorted.iter().map(|offer| format!("{}/{}", offer.r#type, offer.cls)).collect();
            assert_eq!(sorted, expected);
        }
    }
}
